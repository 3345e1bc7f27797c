// Descriptions shared by the contrastive statistics and the statistics over soft assignments.
#pragma once
#include "bindings/call.h"
#include "cpu/contrastive/arrange.h"

namespace fastcl {

Problem read_problem(const pybind11::tuple &numbers);

// Makes every negative cluster of a self-contrast mean none, not only -1. The result owns the copy that this may take.
std::shared_ptr<const void> with_negatives_alone(Problem &p);

template <class Description> void read_gradients(Reader &outputs, Description &call) {
  call.anchor_gradient = outputs.address();
  call.contrast_gradient = outputs.address();
  call.scale_gradient = outputs.address();
  call.bias_gradient = outputs.address();
  require(!call.contrast_gradient || !call.problem.self_contrast(), "contrast_gradient: self-contrast has none");
  require(!call.bias_gradient || call.problem.contrast_bias, "bias_gradient: there is no bias");
}

// A call of an engine's entry that also takes the order of rows by cluster.
template <class Description, class Entry> std::unique_ptr<Call> arranged_call(const Description &call, Entry entry) {
  std::shared_ptr<const Arrangements> arrangements;
  {
    pybind11::gil_scoped_release release;
    arrangements = std::make_shared<const Arrangements>(arrange(call.problem));
  }
  return std::make_unique<Call>([=](void *workspace) { return entry(call, arrangements->arranged(), workspace); });
}

} // namespace fastcl
