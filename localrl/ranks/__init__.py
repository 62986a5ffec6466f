"""Several processes that train one model, each with its own copy: who they are, what they send."""
