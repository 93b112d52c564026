"""Reports: the page of each kind of run folder, and the parts from which pages are drawn."""
