//! The command line, as clap parses it. Flags keep llama-bench's names where it has them.

use crate::lists::List;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use decode_graph::session::SessionOptions;
use std::path::PathBuf;

/// Latency of a language model's decode step, captured once as a CUDA graph and replayed per token
#[derive(Debug, Parser)]
#[command(
    name = "decode-bench",
    version,
    after_help = "Without a subcommand: run.\n\
        Environment: GPU_DEBUG (0; 1 print each step; 2 also compare with the reference), \
        CUDA_VISIBLE_DEVICES, NO_COLOR, RUST_LOG.\n\
        Exit codes: 0 ok, 1 other failure, 2 usage, 3 model file invalid, 4 not supported, \
        5 no GPU or driver, 6 GPU out of memory, 7 GPU fault, 8 verification failed, \
        9 regression, 10 too noisy to judge, 74 I/O, 130 interrupted."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Measure the latency of decode at each depth
    Run(RunArgs),
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Prove a model on this machine against the CPU reference, or against a golden file
    Verify(VerifyArgs),
    /// Say what a model file holds, what is supported and what is not
    Inspect(InspectArgs),
    /// Print the plan that would be captured, without a GPU; or what a GPU's driver made of it
    Graph(GraphArgs),
    /// Show where a token's time goes, step by step
    Profile(ProfileArgs),
    /// Compare two result files of `run -o json`
    Compare(CompareArgs),
    /// Draw results as SVG
    Plot(PlotArgs),
    /// Write synthetic weights as a GGUF file
    Synth(SynthArgs),
    /// Say what of this machine is ready, and what to fix
    Doctor(DoctorArgs),
    /// Print a completion script
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page
    Man,
}

/// Which model.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// GGUF file, or folder with config.json and safetensors
    #[arg(short = 'm', long = "model", value_name = "FILE", conflicts_with = "synthetic")]
    pub(crate) model: Option<PathBuf>,
    /// Seeded random weights of a real model's shape, made in memory: llama-3.2-1b:q4_k_m
    #[arg(long, value_name = "SHAPE[:QUANT]")]
    pub(crate) synthetic: Option<String>,
}

/// Where and how it runs.
#[derive(Clone, Debug, Args)]
pub(crate) struct EngineArgs {
    /// What computes: auto is CUDA if a device answers, else the CPU reference
    #[arg(long, value_name = "auto|cuda|cpu", default_value = "auto")]
    pub(crate) backend: Backend,
    /// Replay one captured graph, or issue each kernel; `run` also takes both: in turn, compared
    #[arg(long, value_name = "graph|eager|both", default_value = "graph")]
    pub(crate) mode: ModeArg,
    /// Device, counted after CUDA_VISIBLE_DEVICES
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) device: u32,
    /// Element type of the cached keys [default: f16 on CUDA, f32 on the CPU]
    #[arg(long, value_name = "f16|f32")]
    pub(crate) cache_type_k: Option<Kv>,
    /// Element type of the cached values; that of the keys
    #[arg(long, value_name = "f16|f32")]
    pub(crate) cache_type_v: Option<Kv>,
    /// Run the plain plan, every op a kernel of its own
    #[arg(long)]
    pub(crate) no_fuse: bool,
    #[command(flatten)]
    pub(crate) kernels: KernelArgs,
    #[command(flatten)]
    pub(crate) ignored: Ignored,
}

/// What a token is on a GPU; the default is the library's.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct KernelArgs {
    /// A token as one persistent kernel, where device and plan have one (compute 9.0): the default
    #[arg(long, conflicts_with = "chain")]
    persistent: bool,
    /// A token as a chain of kernels, one a step of the plan
    #[arg(long)]
    chain: bool,
}

impl KernelArgs {
    /// Whether the persistent kernel is wanted.
    pub(crate) fn persistent(self) -> bool {
        !self.chain && (self.persistent || SessionOptions::default().persistent)
    }
}

/// Flags of llama-bench without a meaning here: accepted, so that its lines can be pasted.
#[derive(Clone, Debug, Args)]
pub(crate) struct Ignored {
    #[arg(long, hide = true)]
    n_gpu_layers: Vec<String>,
    #[arg(long, hide = true)]
    flash_attn: Vec<String>,
    #[arg(short = 't', long, hide = true)]
    threads: Vec<String>,
    #[arg(short = 'b', long, hide = true)]
    batch_size: Vec<String>,
    #[arg(long, hide = true)]
    ubatch_size: Vec<String>,
    #[arg(long, hide = true)]
    mmap: Vec<String>,
    #[arg(long, hide = true)]
    split_mode: Vec<String>,
    #[arg(long, hide = true)]
    load_mode: Vec<String>,
}

impl Ignored {
    /// Those that were given, as llama-bench spells them.
    pub(crate) fn given(&self) -> Vec<&'static str> {
        [
            ("-ngl", &self.n_gpu_layers),
            ("-fa", &self.flash_attn),
            ("-t", &self.threads),
            ("-b", &self.batch_size),
            ("-ub", &self.ubatch_size),
            ("-mmp", &self.mmap),
            ("-sm", &self.split_mode),
            ("-lm", &self.load_mode),
        ]
        .into_iter()
        .filter(|(_, values)| !values.is_empty())
        .map(|(flag, _)| flag)
        .collect()
    }
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// Prompt tokens of a test, each computed in one step; lists and ranges as llama-bench's
    #[arg(short = 'p', long, value_name = "N,..", default_value = "0")]
    pub(crate) n_prompt: Vec<List>,
    /// Generated tokens of a test
    #[arg(short = 'n', long, value_name = "N,..", default_value = "128")]
    pub(crate) n_gen: Vec<List>,
    /// -pg: tests of a prompt and generation together
    #[arg(long = "pg", value_name = "PP,TG")]
    pub(crate) prompt_gen: Vec<List>,
    /// Positions before the first token: 0,4096 or 0-8192+4096 or 512-8192*2
    #[arg(short = 'd', long, value_name = "N,..", default_value = "0")]
    pub(crate) n_depth: Vec<List>,
    /// Repetitions of a test
    #[arg(short = 'r', long, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) repetitions: u32,
    /// Go on after -r until the median is known to ±PCT % (95 %); end with 10 if it never is
    #[arg(long, value_name = "PCT")]
    pub(crate) max_noise: Option<f64>,
    /// Repetitions with --max-noise, at most
    #[arg(long, value_name = "N", default_value_t = 100,
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) max_repetitions: u32,
    /// End with 10 after printing if the device was throttled, its clock drifted, or the warm-up
    /// never became stable
    #[arg(long)]
    pub(crate) strict: bool,
    /// Keep the results under this name, for `compare`
    #[arg(long, value_name = "NAME")]
    pub(crate) save_baseline: Option<String>,
    /// Folder of the baselines
    #[arg(long, value_name = "FOLDER", default_value = "baselines")]
    pub(crate) baselines: PathBuf,
    /// Format of stdout
    #[arg(short = 'o', long, value_name = "FORMAT", default_value = "md")]
    pub(crate) output: ReportFormat,
    /// -oe: print the results also on stderr, in this format
    #[arg(long, value_name = "FORMAT")]
    pub(crate) output_err: Option<ReportFormat>,
    /// Do not warm up
    #[arg(long)]
    pub(crate) no_warmup: bool,
    /// Seconds to wait before each repetition
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) delay: u32,
    /// Say on stderr which test runs
    #[arg(long)]
    pub(crate) progress: bool,
    /// Say on stderr: outliers, captures, driver calls a token, allocations, load times
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// List the CUDA devices and end
    #[arg(long)]
    pub(crate) list_devices: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// What to continue
    #[arg(
        short = 'p',
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        required_unless_present = "prompt_ids",
        conflicts_with = "prompt_ids"
    )]
    pub(crate) prompt: Option<String>,
    /// Token ids to continue: needs no tokenizer
    #[arg(long, value_name = "ID,..", value_delimiter = ',')]
    pub(crate) prompt_ids: Option<Vec<u32>>,
    /// Tokens to generate
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) n_gen: u32,
    /// Positions of the cache [default: what the prompt and -n need]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) capacity: Option<u32>,
    /// Make the prompt a user's turn, by the model's own chat template
    #[arg(long, requires = "prompt")]
    pub(crate) chat: bool,
    /// What the system's turn before it says
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub(crate) system: Option<String>,
    /// Temperature, drawing the token on the device; 0 takes the most probable one
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub(crate) temp: f32,
    /// Sample among this many most probable tokens; 0 is all
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub(crate) top_k: u32,
    /// Sample among the most probable tokens that have this probability together
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub(crate) top_p: f32,
    /// Sample among the tokens at least this fraction as probable as the most probable one
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    pub(crate) min_p: f32,
    /// Seed of sampling
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Go on after the end of the text
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// With -o json: the N largest logits of each step, and log Σ exp(logit)
    #[arg(long, value_name = "N", requires = "output")]
    pub(crate) top: Option<usize>,
    /// json: one object at the end, instead of text as it comes
    #[arg(short = 'o', long, value_name = "json")]
    pub(crate) output: Option<JsonOnly>,
    /// What GPU_DEBUG prints (1 if it is unset), of these steps only: L03,*.down,lm_head
    #[arg(long, value_name = "LABEL,..")]
    pub(crate) debug_steps: Option<String>,
    /// Keep what those steps write: FOLDER/POSITION-LABEL-BUFFER.npy, f32
    #[arg(long, value_name = "FOLDER", requires = "debug_steps")]
    pub(crate) dump: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// Outside truth to check against: logits and greedy continuations
    #[arg(long, value_name = "FILE")]
    pub(crate) golden: Option<PathBuf>,
    /// Find the first step that departs from the CPU reference, by bisection over the plan
    #[arg(long, conflicts_with = "golden")]
    pub(crate) bisect: bool,
    /// Positions to compare (without --golden)
    #[arg(short = 'n', long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u32).range(2..=4096))]
    pub(crate) n_gen: u32,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// List every tensor
    #[arg(short, long)]
    pub(crate) verbose: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GraphArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Format
    #[arg(short = 'o', long, value_name = "plan|dot|json", default_value = "plan")]
    pub(crate) output: GraphFormat,
    /// Positions of the cache
    #[arg(long, value_name = "N", default_value_t = 4096,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) capacity: u32,
    /// Element type of the cache
    #[arg(long, value_name = "f16|f32", default_value = "f16")]
    pub(crate) cache_type_k: Kv,
    /// The plain plan, before fusion
    #[arg(long)]
    pub(crate) no_fuse: bool,
    /// Capture it, and print what the driver holds; ends with 8 where that is not the plan
    #[arg(long)]
    pub(crate) captured: bool,
    /// With --captured: device, counted after CUDA_VISIBLE_DEVICES
    #[arg(long, value_name = "N", default_value_t = 0, requires = "captured")]
    pub(crate) device: u32,
    #[command(flatten)]
    pub(crate) kernels: KernelArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ProfileArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// Positions that are in the cache before
    #[arg(short = 'd', long, value_name = "N", default_value_t = 0)]
    pub(crate) depth: u32,
    /// Tokens that are profiled, and those of the plain replay that the profile is held against
    #[arg(short = 'n', long, visible_alias = "tokens", value_name = "N", default_value_t = 128,
          value_parser = clap::value_parser!(u32).range(2..1024))]
    pub(crate) n_gen: u32,
    /// Only replay N tokens inside the profiler's range, for nsys and ncu
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) steps: Option<u32>,
    /// Only the sums by kernel, not every step
    #[arg(long)]
    pub(crate) by_kernel: bool,
    /// Format: json is for `plot`, trace for ui.perfetto.dev and chrome://tracing
    #[arg(short = 'o', long, value_name = "md|json|trace", default_value = "md")]
    pub(crate) output: ProfileFormat,
}

/// How `profile` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProfileFormat {
    Md,
    Json,
    Trace,
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// Results before the change: a file, or a name given to --save-baseline
    pub(crate) base: PathBuf,
    /// Results after it, likewise
    pub(crate) new: PathBuf,
    /// End with 9 when a test is slower for sure and by more than PCT %, with 10 when that cannot
    /// be ruled out; without it a difference counts from 1 % on, and the end is 0
    #[arg(long, value_name = "PCT")]
    pub(crate) fail_on_regression: Option<f64>,
    /// Compare results of different GPUs (or CPUs) too
    #[arg(long)]
    pub(crate) across_devices: bool,
    /// Folder of the baselines
    #[arg(long, value_name = "FOLDER", default_value = "baselines")]
    pub(crate) baselines: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct PlotArgs {
    /// Results of `run -o json` or of `profile -o json`
    #[arg(required = true, num_args = 1..)]
    pub(crate) results: Vec<PathBuf>,
    /// What to draw [default: kernels of a profile, ab of two files, depth of several depths,
    /// else trace]
    #[arg(long, value_name = "KIND")]
    pub(crate) kind: Option<PlotKind>,
    /// The SVG file to write, instead of stdout
    #[arg(short = 'o', long, value_name = "FILE.svg")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct SynthArgs {
    /// Shape and mixture: llama-3.2-1b:q4_k_m
    #[arg(value_name = "SHAPE[:QUANT]")]
    pub(crate) spec: String,
    /// The file to write
    #[arg(short = 'o', long, value_name = "FILE.gguf")]
    pub(crate) output: PathBuf,
    /// Another seed gives other weights
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// cuda: fail when no device answers
    #[arg(long, value_name = "auto|cuda|cpu", default_value = "auto")]
    pub(crate) backend: Backend,
}

/// `--backend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    Auto,
    Cuda,
    Cpu,
}

/// `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeArg {
    Graph,
    Eager,
    Both,
}

/// Element type of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kv {
    F16,
    F32,
}

/// Format of results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReportFormat {
    Md,
    Json,
    Jsonl,
    Csv,
    Sql,
}

/// `plot --kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PlotKind {
    /// Time a token by depth, with the roofline
    Depth,
    /// Time of each token, with throttling
    Trace,
    /// Share of tokens below each time
    Distribution,
    /// Time of each kernel
    Kernels,
    /// Each test of the second file against the first
    Ab,
}

/// `-o json`, where text is the alternative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum JsonOnly {
    Json,
}

/// Format of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GraphFormat {
    Plan,
    Dot,
    Json,
}
