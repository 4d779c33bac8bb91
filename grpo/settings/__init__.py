"""Settings: config.yaml, files and flags -> one frozen Config. Nothing here imports torch."""
