"""Select rows for a target, with a model and rows in memory: the rows, their scores, and the report.

Run: python examples/select_in_one_line.py
"""

import tiny

from pipelines import select

model, tokenizer = tiny.model(vocabulary=260), tiny.tokenizer()
pool = [{"prompt": f"{i} plus {i}?", "completion": str(2 * i), "source": "sums"} for i in range(40)]
pool += [{"prompt": f"The colour of {i}?", "completion": "blue " * (i % 5 + 1), "source": "colours"} for i in range(40)]
target = [{"prompt": "The colour of 99?", "completion": "blue blue"}]

chosen = select(model, tokenizer, pool, target, budget="10%", settings={"warmup.epochs": 1, "lora.rank": 2})
print(chosen.report())
print(chosen.scores[chosen.scores.selected][["id", "source", "score", "rank"]].sort_values("rank"))
print("first row:", chosen.dataset[0])
