"""Learning-rate schedules by DeepSpeed's names, beside those of torch."""
