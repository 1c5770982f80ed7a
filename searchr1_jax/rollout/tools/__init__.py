"""What the policy may call, a file a tool; `run.tools.TOOLS` makes them of a config, `environment` says what one is."""
