"""This machine and this job: files, threads, processes, bars, options.

* `files`: files that appear whole or not at all.
* `columns`: rows of text as columns.
* `units`: numbers of bytes as text.
* `extras`: what an installation may lack, and which extra has it.
* `options`: typed options out of a config section.
* `warning`: warnings at the caller's own line.
* `progress`: a bar on a terminal, a line every few seconds elsewhere.
* `usage`: what a step takes.
* `stopping`: Ctrl-C and SIGTERM, after which what is done is kept.
* `kept`: what was made of a function, as long as the function lives.
* `threads`: independent decompositions side by side.
* `meshes`: the mesh that the caller's code runs under.
* `processes`, `agreement`: what the processes of a job tell each other, and
  whether they ask for the same.
"""
