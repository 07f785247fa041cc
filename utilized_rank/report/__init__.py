"""What was measured, as tables, figures and pages.

* `measure`: the public verb; `report` what it returns, `layer` of one kernel.
* `tables`, `plots`, `page`: for a terminal, as figures, as a page, whose table
  is `layers_section`.
* `frame`: what pages are made of. `choice`, `choice_page`: what `compress`
  chose, for a terminal and as a section of the page.
* `depth`: where layers stand along a model; `look`: how figures look.
* `comparison`, `comparison_page`, `comparison_plots`: several reports side by
  side, over `repetitions`.
"""
