"""The judges of frozen features: functions of train and test features that know neither files nor ranks."""
