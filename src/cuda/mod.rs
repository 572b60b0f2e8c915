//! The plan on a CUDA device: driver binding, memory, kernels, issue, graph, debug.

pub mod driver;
