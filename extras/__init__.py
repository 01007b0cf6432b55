import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in train.py
