//! Link settings for libtorch, which only the package that makes the binary can give:
//! the folder of the shared libraries goes into the run path (`DEP_TCH_LIBTORCH_LIB` comes from torch-sys).

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    let lib =
        std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys tells its dependents where libtorch is");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    // target/release/hra finds libtorch beside it after the checkout has been moved, too.
    println!("cargo::rustc-link-arg=-Wl,-rpath,$ORIGIN/../../.libtorch/torch/lib");
}
