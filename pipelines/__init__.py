"""The command line and what it runs: one module a pipeline, each with `run(config)`.

    from pipelines.settings.config import SelectConfig
    from pipelines.select.run import run
    folder = run(SelectConfig(model="path/to/model", train="pool.jsonl", target="dev.jsonl", budget="5%"))

Importing this package imports nothing else: `datatools --help` answers at once.
"""
