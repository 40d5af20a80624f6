"""What happened, measured: clock, histograms, fault latencies, facts of this host."""
