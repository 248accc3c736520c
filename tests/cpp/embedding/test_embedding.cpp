// SPDX-License-Identifier: Apache-2.0
// Modules saved by Python, run in a process without Python: TorchScript and AOTInductor packages.
//
// ZEXPERT_EMBEDDING_FILES is the folder that save_modules.py wrote. ZEXPERT_LIBRARY, if set, is the library to dlopen;
// the program that links zexpert::zexpert does without.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/cuda.h>
#include <torch/script.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::string path_of(const std::string& file) {
  const char* folder = std::getenv("ZEXPERT_EMBEDDING_FILES");
  if (folder == nullptr)
    throw std::runtime_error("ZEXPERT_EMBEDDING_FILES is not set");
  return std::string(folder) + "/" + file;
}

struct Case {
  std::vector<at::Tensor> inputs;
  at::Tensor output;
};

/// Inputs of several sizes and the outputs that Python computed.
std::vector<Case> load_cases(const std::string& name) {
  std::ifstream file(path_of(name + ".cases.pt"), std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const c10::IValue saved = torch::jit::pickle_load(bytes);
  std::vector<Case> cases;
  for (const c10::IValue& element : saved.toListRef()) {
    const auto& pair = element.toTupleRef().elements();
    Case one;
    for (const c10::IValue& input : pair[0].toTupleRef().elements()) one.inputs.push_back(input.toTensor());
    one.output = pair[1].toTensor();
    cases.push_back(one);
  }
  return cases;
}

void expect_output(const at::Tensor& actual, const Case& expected, const std::string& module) {
  // The libraries may have been compiled with other options than Python's.
  EXPECT_TRUE(at::allclose(actual.cpu(), expected.output, 1e-5, 1e-5))
      << module << " with inputs of " << expected.inputs[0].sizes();
  EXPECT_EQ(actual.sizes(), expected.output.sizes());
}

class Libraries : public testing::Environment {
  void SetUp() override {
    const char* library = std::getenv("ZEXPERT_LIBRARY");
    if (library != nullptr)
      ASSERT_NE(dlopen(library, RTLD_NOW | RTLD_LOCAL), nullptr) << dlerror();
  }
};

[[maybe_unused]] const testing::Environment* const kLibraries = testing::AddGlobalTestEnvironment(new Libraries);

class Embedding : public testing::TestWithParam<const char*> {};

void run_scripts(const std::string& name, const at::Device& device, const std::vector<std::string>& kinds) {
  const c10::InferenceMode inference;
  const std::vector<Case> cases = load_cases(name);
  ASSERT_EQ(cases.size(), 4U);
  for (const std::string& kind : kinds) {
    torch::jit::Module module = torch::jit::load(path_of(name + kind), device);
    for (const Case& one : cases) {
      std::vector<c10::IValue> inputs;
      for (const at::Tensor& input : one.inputs) inputs.emplace_back(input.to(device));
      expect_output(module.forward(inputs).toTensor(), one, name + kind);
    }
  }
}

TEST_P(Embedding, TorchScript) { run_scripts(GetParam(), at::kCPU, {".script.pt", ".frozen.pt", ".trace.pt"}); }

TEST_P(Embedding, TorchScriptOnCuda) {
  if (!torch::cuda::is_available())
    GTEST_SKIP() << "no CUDA device";
  run_scripts(GetParam(), at::kCUDA, {".script.pt", ".frozen.pt"});  // a trace keeps the experts of the CPU
}

void run_package(const std::string& name, const at::Device& device) {
  const c10::InferenceMode inference;
  const std::string package = name + "." + device.str() + ".pt2";
  torch::inductor::AOTIModelPackageLoader loader(path_of(package));
  for (const Case& one : load_cases(name)) {
    std::vector<at::Tensor> inputs;
    for (const at::Tensor& input : one.inputs) inputs.push_back(input.to(device));
    const std::vector<at::Tensor> outputs = loader.run(inputs);
    ASSERT_EQ(outputs.size(), 1U);
    expect_output(outputs[0], one, package);
  }
}

TEST_P(Embedding, AotInductorPackage) { run_package(GetParam(), at::kCPU); }

TEST_P(Embedding, AotInductorPackageOnCuda) {
  if (!torch::cuda::is_available())
    GTEST_SKIP() << "no CUDA device";
  run_package(GetParam(), at::kCUDA);
}

TEST(EmbeddingErrors, BadInputIsOneSentenceAndNoCrash) {
  torch::jit::Module module = torch::jit::load(path_of("layer.script.pt"));
  try {
    module.forward({at::zeros({3, 24}), at::zeros({3, 9})});
    FAIL() << "logits of a wrong width were taken";
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find("router_logits must have one column per expert (10), got 9"),
              std::string::npos)
        << error.what();
  }
}

INSTANTIATE_TEST_SUITE_P(, Embedding, testing::Values("layer", "block"));

}  // namespace
