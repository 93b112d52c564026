"""`datatools plan`: what a selection costs on a cluster, before anything runs."""
