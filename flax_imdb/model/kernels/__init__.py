"""The LSTM as one kernel a pass, for chips on which a scan waits."""
