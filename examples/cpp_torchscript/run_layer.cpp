// SPDX-License-Identifier: Apache-2.0
// Runs a scripted zexpert module in a process without Python.
//
// Usage: run_layer MODULE TOKENS [--device DEVICE] [--repeat N] [--library LIBRARY]... [--expect FILE]
//
//   MODULE      what torch.jit.save wrote
//   TOKENS      a tuple of the module's arguments, or one tensor, as torch.save wrote it
//   --device    "cpu" (default), "cuda" or "cuda:1"
//   --repeat    number of timed calls, 20 unless given
//   --library   a library to load first, such as zexpert/lib/libzexpert.so of a wheel; needed unless linked
//   --expect    the output that torch.save wrote in Python, to compare with
#include <dlfcn.h>
#include <torch/script.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Options {
  std::string module;
  std::string tokens;
  std::string expected;
  std::vector<std::string> libraries;
  torch::Device device = torch::kCPU;
  int repeat = 20;
};

Options parse(int argc, char** argv) {
  Options options;
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("--", 0) != 0) {
      files.push_back(argument);
      continue;
    }
    if (i + 1 == argc)
      throw std::invalid_argument(argument + " needs a value");
    const std::string value = argv[++i];
    if (argument == "--device") {
      options.device = torch::Device(value);
    } else if (argument == "--repeat") {
      options.repeat = std::max(1, std::atoi(value.c_str()));
    } else if (argument == "--library") {
      options.libraries.push_back(value);
    } else if (argument == "--expect") {
      options.expected = value;
    } else {
      throw std::invalid_argument("unknown option " + argument);
    }
  }
  if (files.size() != 2)
    throw std::invalid_argument(
        "usage: run_layer MODULE TOKENS [--device DEVICE] [--repeat N] [--library LIBRARY]... [--expect FILE]");
  options.module = files[0];
  options.tokens = files[1];
  return options;
}

/// Loading a library of zexpert's registers its operators; it stays loaded until the process ends.
void load_library(const std::string& path) {
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr)
    throw std::runtime_error(std::string("cannot load the library: ") + dlerror());
}

torch::jit::Module load_module(const Options& options) {
  try {
    torch::jit::Module module = torch::jit::load(options.module, options.device);
    module.eval();
    return module;
  } catch (const std::exception& error) {
    if (std::string(error.what()).find("Unknown builtin op: zexpert::") == std::string::npos)
      throw;
    throw std::runtime_error(options.module +
                             " calls zexpert's operators, which this process lacks: link zexpert::zexpert, or pass "
                             "--library .../zexpert/lib/libzexpert.so");
  }
}

/// What torch.save wrote.
torch::IValue load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file)
    throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return torch::jit::pickle_load(bytes);
}

std::vector<torch::IValue> load_tokens(const Options& options) {
  const torch::IValue saved = load(options.tokens);
  if (saved.isTensor())
    return {saved.toTensor().to(options.device)};
  std::vector<torch::IValue> arguments;
  for (const torch::IValue& value : saved.toTupleRef().elements())
    arguments.push_back(value.toTensor().to(options.device));
  return arguments;
}

double milliseconds(torch::jit::Module& module, const std::vector<torch::IValue>& arguments) {
  const auto begin = std::chrono::steady_clock::now();
  // Reading one element back waits for the device.
  (void)module.forward(arguments).toTensor().flatten().slice(0, 0, 1).cpu();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

void run(const Options& options) {
  for (const std::string& library : options.libraries) load_library(library);
  torch::jit::Module module = load_module(options);
  const std::vector<torch::IValue> arguments = load_tokens(options);

  const torch::InferenceMode inference;
  const torch::Tensor output = module.forward(arguments).toTensor();
  std::vector<double> times;
  for (int i = 0; i < options.repeat; ++i) times.push_back(milliseconds(module, arguments));
  std::sort(times.begin(), times.end());

  std::printf("output %s of %s, root mean square %.4f\n", c10::str(output.sizes()).c_str(),
              c10::toString(output.scalar_type()), output.to(torch::kFloat64).square().mean().sqrt().item<double>());
  std::printf("%d calls on %s: median %.3f ms, fastest %.3f ms\n", options.repeat, options.device.str().c_str(),
              times[times.size() / 2], times.front());
  if (!options.expected.empty()) {
    const torch::Tensor difference = (output.cpu() - load(options.expected).toTensor()).abs();
    std::printf("largest difference from %s: %.1e\n", options.expected.c_str(), difference.max().item<double>());
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what_without_backtrace());
    return EXIT_FAILURE;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}
