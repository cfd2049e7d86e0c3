// Each op binds its own functions; bindings.cpp calls all of them and names none.
//
//     // csrc/<op>/api.cpp
//     HUNYUAN_FAST_BIND(fused_modulation, m) { m.def("fused_modulation_fwd", &forward, ...); }
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace hunyuan_fast {

using Bind = void (*)(pybind11::module_&);

inline std::vector<Bind>& bindings() {
    static std::vector<Bind> all;
    return all;
}

struct Registrar {
    explicit Registrar(Bind bind) { bindings().push_back(bind); }
};

}  // namespace hunyuan_fast

#define HUNYUAN_FAST_BIND(op, module)                                             \
    static void hunyuan_fast_bind_##op(pybind11::module_& module);                \
    static ::hunyuan_fast::Registrar const registrar_##op{hunyuan_fast_bind_##op}; \
    static void hunyuan_fast_bind_##op(pybind11::module_& module)
