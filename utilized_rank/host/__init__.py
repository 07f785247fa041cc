"""This machine and this job: files, threads, processes, bars, options.

* `files`: files that appear whole or not at all.
* `options`: typed options out of a config section.
* `progress`: a bar on a terminal, a rare line elsewhere.
* `threads`: independent decompositions side by side.
* `meshes`: the mesh that the caller's code runs under.
* `processes`, `agreement`: what the processes of a job tell each other, and
  whether they ask for the same.
* `kept`: what was made of a function, as long as the function lives.
"""
