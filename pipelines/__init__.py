"""The command line and what it runs: one module a pipeline, each with `run(config)`, callable without the command line.

    from pipelines.config import SelectConfig
    from pipelines.select import run
    folder = run(SelectConfig(model="path/to/model", train="pool.jsonl", target="dev.jsonl", budget="5%"))
"""
