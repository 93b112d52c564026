"""Row formats: one file per format and one line in `table.FORMATS`."""
