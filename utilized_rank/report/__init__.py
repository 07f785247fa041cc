"""What was measured, as tables, figures and pages.

* `measure`: the public verb; `report` what it returns, `layer` of one kernel.
* `tables`, `plots`, `page`: for a terminal, as figures, as a page.
* `choice`: what `compress` chose, for a terminal. `sections`: it and the table
  of the layers, as sections of the page. `frame`: what pages are made of.
* `depth`: where layers stand along a model; `look`: how figures look.
* `comparison`, `comparison_page`, `comparison_plots`: several reports side by
  side, over `repetitions`.
"""
