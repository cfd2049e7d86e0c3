// The one Python module of the native code, hunyuan_fast._C.
#include <pybind11/pybind11.h>

#include "common/cpu_isa.h"
#include "common/registry.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of hunyuan_fast. Tensors go in as they are; outputs are allocated by the caller.";
#ifdef HUNYUAN_FAST_CUDA
    m.attr("has_cuda") = true;
#else
    m.attr("has_cuda") = false;
#endif
    py::list archs;
    for (auto arch : py::str(HUNYUAN_FAST_CUDA_ARCHS).attr("split")()) archs.append(arch);
    m.attr("cuda_archs") = py::tuple(archs);
    m.attr("build_info") = HUNYUAN_FAST_BUILD_INFO;
    m.attr("sources") = HUNYUAN_FAST_SOURCES;  // scripts/native_sources.py, when it was built
    m.def("cpu_isa", [] { return hunyuan_fast::name_of(hunyuan_fast::cpu_isa()); },
          "The instruction set that the CPU kernels use here.");
    for (auto bind : hunyuan_fast::bindings()) bind(m);
}
