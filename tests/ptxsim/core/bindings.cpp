// SPDX-License-Identifier: Apache-2.0
// The Python module: the lists of types.h as dictionaries, its records as numpy dtypes, and run().
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "machine.h"

namespace py = pybind11;
using namespace ptxsim;

namespace {

template <class T>
using Records = py::array_t<T, py::array::c_style>;

py::dict numbered(std::initializer_list<const char*> names) {
  py::dict result;
  int i = 0;
  for (const char* name : names) result[name] = i++;
  return result;
}

// buffers: (address, data, initialised, read_only, track_races), with arrays of bytes
// before: the footprints (address, sectors) of the launch that this one may overlap with; none where it may not
py::tuple run(Records<Instruction> program, const LaunchConfig& config, const std::vector<u64>& constants,
              const std::vector<s32>& constant_slots, const py::list& buffers, const py::list& before,
              Records<u8> params) {
  std::vector<Buffer> plain;
  for (py::handle item : buffers) {
    auto [address, data, initialised, read_only, track_races] =
        item.cast<std::tuple<u64, py::array_t<u8>, py::array_t<u8>, bool, bool>>();
    plain.push_back({address, static_cast<u64>(data.size()), static_cast<u8*>(const_cast<void*>(data.request().ptr)),
                     static_cast<u8*>(const_cast<void*>(initialised.request().ptr)), read_only, track_races});
  }
  std::vector<Footprint> plain_before;
  for (py::handle item : before) {
    auto [address, sectors] = item.cast<std::tuple<u64, Records<u8>>>();
    plain_before.push_back({address, {sectors.data(), sectors.data() + sectors.size()}});
  }
  const py::ssize_t instructions = program.size();
  if (instructions >= Touch::instruction_limit) throw py::value_error("a kernel may have 131,071 instructions at most");
  Records<InstructionStats> stats(instructions);
  memset(stats.mutable_data(), 0, stats.nbytes());
  Machine machine(program.data(), config, plain, plain_before, params.mutable_data(), stats.mutable_data());
  {
    py::gil_scoped_release release;
    machine.run(constants, constant_slots);
  }
  Records<Report> reports(static_cast<py::ssize_t>(machine.reports.size()));
  std::copy(machine.reports.begin(), machine.reports.end(), reports.mutable_data());
  py::list footprints;
  for (const Footprint& part : machine.footprints) {
    footprints.append(
        py::make_tuple(part.address, Records<u8>(static_cast<py::ssize_t>(part.sectors.size()), part.sectors.data())));
  }
  return py::make_tuple(stats, reports, footprints, machine.steps);
}

}  // namespace

PYBIND11_MODULE(ptxsim_core, m) {
  PYBIND11_NUMPY_DTYPE(Instruction, op, type, type2, destinations, sources, space, rounding, predicate_negated, flags,
                       modifier, predicate, target, operands, offset, source_offset);
  PYBIND11_NUMPY_DTYPE(InstructionStats, warps, threads, requests, bytes, sectors, ideal_sectors, waves, ideal_waves,
                       remote_bytes);
  PYBIND11_NUMPY_DTYPE(Report, kind, instruction, other_instruction, block, thread, other_block, other_thread, lanes,
                       address, count, buffer, size);
  m.attr("instruction_dtype") = py::dtype::of<Instruction>();
#define X(name) #name,
  m.attr("TYPES") = numbered({PTXSIM_TYPES(X)});
  m.attr("OPS") = numbered({PTXSIM_OPS(X)});
  m.attr("COMPARISONS") = numbered({PTXSIM_COMPARISONS(X)});
  m.attr("ROUNDINGS") = numbered({PTXSIM_ROUNDINGS(X)});
  m.attr("ATOMICS") = numbered({PTXSIM_ATOMICS(X)});
  m.attr("SPACES") = numbered({PTXSIM_SPACES(X)});
  m.attr("REPORTS") = numbered({PTXSIM_REPORTS(X)});
  m.attr("FLAG_BITS") = numbered({PTXSIM_FLAGS(X)});
#undef X
  m.attr("SECTOR_BYTES") = sector_bytes;
  m.attr("SECTOR_WRITTEN") = sector_written;
  m.attr("SECTOR_FETCHED") = sector_fetched;
  m.attr("WINDOW_BITS") = window_bits;
  m.attr("FIRST_WINDOW") = first_window;
  m.attr("RANK_SHIFT") = rank_shift;
  m.attr("BUFFER_SHARED") = buffer_shared;
  m.attr("BUFFER_LOCAL") = buffer_local;
  m.attr("BUFFER_PARAM") = buffer_param;

  py::class_<LaunchConfig>(m, "LaunchConfig")
      .def(py::init<>())
      .def_readwrite("grid", &LaunchConfig::grid)
      .def_readwrite("block", &LaunchConfig::block)
      .def_readwrite("cluster", &LaunchConfig::cluster)
      .def_readwrite("shared_bytes", &LaunchConfig::shared_bytes)
      .def_readwrite("dynamic_shared_bytes", &LaunchConfig::dynamic_shared_bytes)
      .def_readwrite("local_bytes", &LaunchConfig::local_bytes)
      .def_readwrite("param_bytes", &LaunchConfig::param_bytes)
      .def_readwrite("slots", &LaunchConfig::slots)
      .def_readwrite("seed", &LaunchConfig::seed)
      .def_readwrite("quantum", &LaunchConfig::quantum)
      .def_readwrite("shuffle_warps", &LaunchConfig::shuffle_warps)
      .def_readwrite("chaos", &LaunchConfig::chaos)
      .def_readwrite("shared_races", &LaunchConfig::shared_races)
      .def_readwrite("global_races", &LaunchConfig::global_races)
      .def_readwrite("mma_mode", &LaunchConfig::mma_mode)
      .def_readwrite("max_steps", &LaunchConfig::max_steps)
      .def_readwrite("only_blocks", &LaunchConfig::only_blocks);
  m.def("run", &run, py::arg("program"), py::arg("config"), py::arg("constants"), py::arg("constant_slots"),
        py::arg("buffers"), py::arg("before"), py::arg("params"));
}
