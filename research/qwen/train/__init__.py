"""Fine-tuning: data, recipes, the loop, checkpoints and reports. Importing this package loads nothing heavy."""
