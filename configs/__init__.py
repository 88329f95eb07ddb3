"""One page is one run; see `default` for every field."""
