"""Reports of comparisons, for people and for programs.

It may import `numbers`, `packages` and `runs`; nothing is trained here. In the order of reading:

- `trials`: the results as data.
- `paper_tables`: as CSV, Markdown and LaTeX.
- `report_text`: in words and in the cells of tables.
- `plots`: as charts over what it costs; `curves`: over the steps of training.
- `labels`: names next to the points of a chart.
- `svg`: a chart as part of a page.
- `html`: the page; its `templates` are in the same folder.
- `report_files`: the files that are written in the end.
"""
