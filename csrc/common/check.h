// HUNYUAN_CHECK(condition, "x must be (B, L, E), got ", x.shape()) raises ValueError in Python.
#pragma once

#include <sstream>
#include <stdexcept>

namespace hunyuan_fast {

template <class... Parts>
[[noreturn]] void refuse(Parts const&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::invalid_argument(text.str());  // pybind11 translates it to ValueError
}

}  // namespace hunyuan_fast

#define HUNYUAN_CHECK(condition, ...)                           \
    do {                                                        \
        if (!(condition)) ::hunyuan_fast::refuse(__VA_ARGS__);  \
    } while (false)
