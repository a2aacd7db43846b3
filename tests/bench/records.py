"""What drawn-up records of every benchmark share."""

ON = {"device": "a GPU", "driver": "1.2", "commit": "abc", "date": "2026-01-01"}
VERSIONS = {"versions": {"torch": "2.0"}}
