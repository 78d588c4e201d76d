// How extern "C" functions report what went wrong to Python: as text, or null if nothing did.
#pragma once

#include <exception>
#include <string>

namespace cuda_on_cpu {

// Runs body(); the sentence of what it throws, valid until the next call, or null.
template <typename Body>
const char* reported(const Body& body) {
  static std::string sentence;
  try {
    body();
  } catch (const std::exception& error) {
    sentence = error.what();
    return sentence.c_str();
  }
  return nullptr;
}

}  // namespace cuda_on_cpu
