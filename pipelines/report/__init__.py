"""Reports: the page of each kind of run folder, and what pages are drawn with."""
