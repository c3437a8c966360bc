"""The paper in miniature: its tables and figures, made again on `weights/mini`.

Read `mini.py` (one run), `plan.py` (which runs), `tables.py`, `report.py` (the page) and `__main__.py`;
`paper.py` has the numbers that were published.
"""
