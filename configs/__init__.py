"""One file per experiment; `default.py` has every key, the others change some of them."""
