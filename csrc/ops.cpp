// SPDX-License-Identifier: Apache-2.0
// Table of contents: every op of the extension, one schema each. Implementations: <device>/<op>.cpp; public functions,
// fakes and gradients: peftkern/ops/<op>.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "choice.h"
#include "cpu/dispatch.h"
#include "cpu/large_buffers.h"
#include "held_tensors.h"

#ifndef PEFTKERN_CUDA_ARCHS
#define PEFTKERN_CUDA_ARCHS ""  // set by setup.py when CUDA is compiled in
#endif

namespace {

std::string cpu_isa() { return peftkern::cpu::kernels().name; }
std::vector<std::string> cpu_isas() { return peftkern::cpu::isa_names(); }
void set_cpu_isa(std::string name) { peftkern::cpu::set_isa(name); }
void set_product(std::string direction, std::string name) { peftkern::set_product(direction, name); }
std::vector<std::string> product_names(std::string direction) { return peftkern::product_names(direction); }
int64_t empty_cpu_cache() { return static_cast<int64_t>(peftkern::cpu::empty_buffer_cache()); }
void set_autotune(bool on) { peftkern::set_autotune(on); }
std::vector<std::string> timed_products() { return peftkern::all_timed(); }
void add_timed_products(std::vector<std::string> lines) { peftkern::add_timed(lines); }
void forget_timed_products() { peftkern::forget_timed(); }
std::string cuda_archs() { return PEFTKERN_CUDA_ARCHS; }

}  // namespace

STABLE_TORCH_LIBRARY(peftkern, m) {
  // nf4
  m.def("quantize_nf4(Tensor w, int block_size) -> (Tensor packed, Tensor absmax)");
  m.def(
      "dequantize_nf4(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, int block_size, int[] "
      "shape, ScalarType dtype) -> Tensor");
  m.def("quantize_absmax(Tensor absmax) -> (Tensor codes, Tensor nested_absmax, Tensor offset)");
  m.def("dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor offset) -> Tensor");
  // adapted_linear
  m.def(
      "adapted_linear(Tensor x, Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? offset, int block_size, "
      "int out_features, Tensor? A, Tensor? B, "
      "Tensor? lam, Tensor? out_scale, Tensor? bias, float scaling, float dropout_p, Tensor? seed, bool save_h, "
      "bool save_z) -> Tensor[]");
  m.def(
      "adapted_linear_backward(Tensor grad, Tensor? x, Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? "
      "offset, int block_size, "
      "int in_features, Tensor? h, Tensor? z, Tensor? A, Tensor? B, Tensor? lam, Tensor? out_scale, float scaling, "
      "float dropout_p, Tensor? seed, int needs) "
      "-> Tensor[]");
  m.def(
      "product_ways(Tensor x, Tensor grad, Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? offset, "
      "int block_size, Tensor? A, Tensor? B, Tensor? lam, Tensor? out_scale) -> str[]");
  // multi_lora
  m.def("multi_lora_plan(Tensor adapter_index, int rows, int adapters) -> Tensor");
  m.def(
      "multi_lora_linear(Tensor x, Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? offset, int "
      "block_size, int out_features, Tensor A, Tensor "
      "B, "
      "Tensor plan, Tensor? ranks, Tensor? scalings, Tensor? bias, float scaling, float dropout_p, Tensor? seed, "
      "bool save_h) -> (Tensor y, Tensor h)");
  m.def(
      "multi_lora_linear_backward(Tensor grad, Tensor? x, Tensor weight, Tensor? absmax, Tensor? nested_absmax, "
      "Tensor? offset, int block_size, "
      "int in_features, Tensor? h, Tensor A, Tensor B, Tensor plan, Tensor? ranks, Tensor? scalings, float scaling, "
      "float dropout_p, Tensor? seed, int needs) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dbias)");
  // dora_norm
  m.def(
      "squared_row_norms(Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? offset, int block_size, "
      "int out_features, int in_features) -> Tensor");
  m.def(
      "dora_norm(Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? offset, int block_size, Tensor A, "
      "Tensor B, Tensor w2, float scaling, ScalarType dtype) -> Tensor");
  // rank_allocation
  m.def(
      "update_importance_(Tensor[] A, Tensor[] E, Tensor[] B, Tensor?[] grad_A, Tensor?[] grad_E, Tensor?[] grad_B, "
      "Tensor(a!) sensitivity, Tensor(b!) uncertainty, float beta1, float beta2, Tensor? grad_scale) -> Tensor scores");
  m.def(
      "update_importance_table_(Tensor table, Tensor(a!) sensitivity, Tensor(b!) uncertainty, float beta1, float "
      "beta2, "
      "Tensor? grad_scale) -> Tensor scores");
  m.def("rank_mask(Tensor scores, int budget, bool exact) -> Tensor keep");
  m.def("mask_ranks_(Tensor(a!)[] E, Tensor keep) -> ()");
  m.def("mask_ranks_table_(Tensor table, Tensor keep) -> ()");
  m.def("hold_tensors(Tensor[] tensors) -> int");
  m.def("held_have_moved(int held, Tensor addresses) -> bool");
  m.def("release_tensors(int held) -> ()");
  m.def("orthogonality(Tensor[] A, Tensor[] B, bool squared) -> (Tensor value, Tensor deviations, Tensor norms)");
  m.def(
      "orthogonality_backward(Tensor grad, Tensor[] A, Tensor[] B, Tensor deviations, Tensor norms, bool squared) "
      "-> (Tensor[] dA, Tensor[] dB)");
  // jacobi_svd
  m.def("jacobi_svd(Tensor matrices) -> (Tensor vectors, Tensor values, Tensor sweeps)");
  // what was built, and what runs
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str[]");
  m.def("set_cpu_isa(str name) -> ()");
  m.def("set_product(str direction, str name) -> ()");
  m.def("product_names(str direction) -> str[]");
  m.def("set_autotune(bool on) -> ()");
  m.def("timed_products() -> str[]");
  m.def("add_timed_products(str[] lines) -> ()");
  m.def("forget_timed_products() -> ()");
  m.def("empty_cpu_cache() -> int");
  m.def("cuda_archs() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CompositeExplicitAutograd, m) {
  m.impl("hold_tensors", TORCH_BOX(&peftkern::hold_tensors));
  m.impl("held_have_moved", TORCH_BOX(&peftkern::held_have_moved));
  m.impl("release_tensors", TORCH_BOX(&peftkern::release_tensors));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
  m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
  m.impl("set_product", TORCH_BOX(&set_product));
  m.impl("product_names", TORCH_BOX(&product_names));
  m.impl("set_autotune", TORCH_BOX(&set_autotune));
  m.impl("timed_products", TORCH_BOX(&timed_products));
  m.impl("add_timed_products", TORCH_BOX(&add_timed_products));
  m.impl("forget_timed_products", TORCH_BOX(&forget_timed_products));
  m.impl("empty_cpu_cache", TORCH_BOX(&empty_cpu_cache));
  m.impl("cuda_archs", TORCH_BOX(&cuda_archs));
}

// Importing the module is what registers the ops; there is nothing else in it.
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) { return PyModule_Create(&module); }
