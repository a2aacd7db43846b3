"""What drawn-up records of every benchmark share."""

ON = {"device": "NVIDIA H100 80GB HBM3", "driver": "1.2", "commit": "abc", "date": "2026-01-01"}
VERSIONS = {"versions": {"torch": "2.0"}}
