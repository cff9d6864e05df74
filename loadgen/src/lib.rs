//! shootdown-loadgen.
