"""Files that are no tests: examples for CONTRIBUTING.md, and a program for the type checker."""

collect_ignore = ["toys", "public_api_types.py"]
