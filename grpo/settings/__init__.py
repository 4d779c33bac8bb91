"""Settings: config.yaml, a settings file and flags become one frozen Config. Nothing here imports torch."""
