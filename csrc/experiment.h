// What MODEST_ALIGN_EXPERIMENT switched on in this build, "" by default (benchmarks/NOTES.md, "Experiments"): this
// file, cuda/experiment.cuh and what names them go once a GPU has said which way is fastest.
#pragma once

#include <string_view>

#ifndef MODEST_ALIGN_EXPERIMENT
#define MODEST_ALIGN_EXPERIMENT
#endif

namespace modest_align {

#define MODEST_ALIGN_NAME_OF(name) #name
#define MODEST_ALIGN_NAME(name) MODEST_ALIGN_NAME_OF(name)
constexpr std::string_view kExperiment = MODEST_ALIGN_NAME(MODEST_ALIGN_EXPERIMENT);
// A warp group has a tile of its own.
constexpr bool kPingpong = kExperiment == "pingpong64" || kExperiment == "pingpong128";
// The second warp group's first epilogue waits.
constexpr bool kStagger = kExperiment == "stagger";
static_assert(kPingpong || kStagger || kExperiment.empty());

}  // namespace modest_align
