"""Reports of comparisons, as pages and tables and as data for programs.

It may import `numbers`, `packages` and `runs`; nothing is trained here. In the order of reading:

- `trials`: the results as data.
- `paper_tables`: the results as CSV, Markdown and LaTeX.
- `report_text`: the results as sentences and cells of tables.
- `plots`: charts of the results over a cost; `curves`: charts over the steps of training.
- `labels`: names next to the points of a chart.
- `svg`: a chart as part of a page.
- `html`: the page; its `templates` are in the same folder.
- `report_files`: the files that are written in the end.
"""
