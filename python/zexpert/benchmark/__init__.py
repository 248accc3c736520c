"""What `zexpert bench` and the scripts of benchmarks/ measure with: timing in turns, outputs checked, floors."""
