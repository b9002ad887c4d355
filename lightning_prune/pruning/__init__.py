"""Make masks: targets, statistics, calibration, scores, allocation, patterns, masks; and hold them."""
