//! The CUDA driver: run-time binding and safe owners of its objects. The only calls to libcuda.
//!
//! | file | promise |
//! |---|---|
//! | `shim` | the crate links and starts without a driver; every symbol `cust` needs is bound at run time |
//! | `api` | the entry points we call, typed, with results as `u32`; replaceable by a test before first use |
//! | `abi` | structures passed to the driver, with their sizes asserted |
//! | `calls` | how many driver calls, captures and allocations this thread made |
//! | `status` | a result code becomes an [`Error`](crate::error::Error): no device, out of memory, recoverable, capture, fatal |
//! | `context` | initialisation, devices, the primary context; frozen, capturing and lost states |
//! | `fork` | a child process has none of it, and is told so |
//! | `memory` | device memory |
//! | `host_memory` | page-locked host memory, plain and mapped into the device |
//! | `stream` | streams and events |
//! | `module` | PTX text to functions, with the compiler's log |
//! | `launch` | one kernel launch, with programmatic and cluster attributes |
//! | `capture` | a stream's work recorded as a graph; capture ends on every path |
//! | `graph` | a captured graph: what is in it, and its executable form |
//! | `profiler` | the range that nsys and ncu record |
//! | `nvtx` | names of what the host does, on their time line |
//!
//! All owners hold their [`Context`], make it current on the thread that uses them, and refuse
//! work without asking the driver once a fault has lost the context. Handles are never null.

#![allow(unsafe_code)]

mod abi;
pub mod api;
pub mod calls;
mod capture;
mod context;
mod fork;
mod graph;
mod host_memory;
mod launch;
mod memory;
mod module;
pub mod nvtx;
pub mod profiler;
pub mod shim;
mod status;
mod stream;

pub use context::{Context, Device, DeviceInfo, Frozen, attribute};
pub use graph::{Edge, Graph, GraphExec, KernelNode, Node, NodeKind, Owner};
pub use host_memory::{MappedMemory, PinnedMemory};
pub use launch::{Attributes, MAX_ARGS, launch};
pub use memory::{DeviceMemory, DeviceSlice};
pub use module::{Function, FunctionAttributes, Module};
pub use status::{Class, classify};
pub use stream::{Event, Stream};
