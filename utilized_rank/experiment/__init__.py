"""One run: config, stages, workdir.

* `pipeline`: train, collect, measure, factorize, finetune, evaluate, report.
* `network`: the network of a run, built or read.
* `shrink`, `recover`: two stages: made smaller, fine-tuned.
* `costs`: FLOPs and milliseconds.
* `workdir`: a run's folder, its finished stages and results.
"""
