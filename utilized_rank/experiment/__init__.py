"""One run: config, stages, workdir.

* `pipeline`: train, collect, measure, factorize, finetune, evaluate, report.
* `settings`: its config as typed options, and which stage reads what.
* `network`: the network of a run, built or read.
* `shrink`, `recover`: two stages: made smaller, fine-tuned.
* `costs`: FLOPs and milliseconds.
* `workdir`: a run's folder, its finished stages and results.
* `occupied`: one process at a time in it.
"""
