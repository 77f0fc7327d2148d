// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/config_list.hpp - compile-time rows of a dispatch table, chosen from at run time.
// Layer: base (host + device, no CUDA headers).
#pragma once

#include <cstddef>
#include <utility>

namespace codegemm {

/// A list of configurations, best first. A configuration is an empty struct with a name that states its
/// numbers and its parameters as static constexpr members; kernels are templates over it.
template <class... Configs>
struct config_list {
  static constexpr std::size_t kSize = sizeof...(Configs);  ///< configurations in the list
};

/// Calls fn(Config{}) for the first Config with predicate(Config{}) and returns true; false when none fits.
///   first_match(config_list<A, B>{}, [&](auto c) { return c.kVecLen == v; },
///               [&](auto c) { run<decltype(c)>(); });
template <class... Configs, class Predicate, class Fn>
constexpr bool first_match(config_list<Configs...> /*list*/, Predicate&& predicate, Fn&& fn) {
  return ((predicate(Configs{}) ? (static_cast<void>(fn(Configs{})), true) : false) || ...);
}

/// Calls fn(Config{}) for every Config, in order: tests and benchmarks go over the same list as the dispatch.
template <class... Configs, class Fn>
constexpr void for_each_config(config_list<Configs...> /*list*/, Fn&& fn) {
  (static_cast<void>(fn(Configs{})), ...);
}

}  // namespace codegemm
