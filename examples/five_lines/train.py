"""The loop from Python: twenty steps of the demonstration."""

from localrl import RunConfig, train

config = RunConfig.create({"run.steps": 20, "task.eval_prompts": 128})
result = train(config)
print(result.base, result.adapter, f"run folder: {result.folder}", sep="\n")
