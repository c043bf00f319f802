// csrc/cpu as a process of its own: answers calls from stdin on stdout until stdin ends; tests/test_arm.py is the
// caller.
//
// It starts with a line of its level and whether that has bfloat16. A call is a line with the function's name, then its
// arguments in the order of functions.inc, which is made of _C.pyi. An answer is what the function returned, then the
// memory behind each address as the function left it.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace {

using namespace modest_align;

constexpr std::size_t kAlignment = 64, kGuard = 4096;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

std::int64_t get_number() {
  std::int64_t number;
  if (std::fread(&number, sizeof number, 1, stdin) != 1) fail("stdin ended within a call");
  return number;
}

// What an address leads to, between guards that must stay as they are.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : bytes_(bytes), all_(kGuard + bytes + kGuard + kAlignment, 0xA5) {
    first_ = kGuard + kAlignment - reinterpret_cast<std::uintptr_t>(all_.data() + kGuard) % kAlignment;
    if (std::fread(data(), 1, bytes, stdin) != bytes) fail("stdin ended within a call");
  }

  unsigned char* data() { return all_.data() + first_; }

  void put(const std::string& function) {
    for (std::size_t i = 0; i < all_.size(); ++i) {
      if ((i < first_ || i >= first_ + bytes_) && all_[i] != 0xA5) fail(function + ": wrote past an argument's end");
    }
    std::fwrite(data(), 1, bytes_, stdout);
  }

 private:
  std::size_t bytes_, first_;
  std::vector<unsigned char> all_;
};

// An argument is a number behind -1, or the content of memory behind its size.
template <class T>
void read(T& field, std::vector<Memory>& memories) {
  const std::int64_t bytes = get_number();
  if constexpr (std::is_pointer_v<T>) {
    if (bytes < 0 && get_number() != 0) fail("got a number for an address");
    if (bytes >= 0) field = reinterpret_cast<T>(memories.emplace_back(bytes).data());
  } else {
    if (bytes >= 0) fail("got memory for a number");
    field = static_cast<T>(get_number());
  }
}

template <class Result, class Arguments, class ReadAll>
void answer(const std::string& name, Result (*function)(const Arguments&), ReadAll read_all) {
  Arguments arguments{};
  std::vector<Memory> memories;
  read_all(arguments, memories);
  std::int64_t result = 0;
  if constexpr (std::is_void_v<Result>) {
    function(arguments);
  } else {
    result = function(arguments);
  }
  std::fwrite(&result, sizeof result, 1, stdout);
  for (Memory& memory : memories) memory.put(name);
  std::fflush(stdout);
}

void answer(const std::string& name) {
#define FIELD(name) read(a.name, memories);
#define FUNCTION(function, fields) \
  if (name == "cpu_" #function)    \
    return answer(name, cpu_kernels().function, [](auto& a, std::vector<Memory>& memories) { fields });
#include "functions.inc"
  fail("there is no function " + name);
}

}  // namespace

int main() {
  std::printf("%s %d\n", cpu_kernels().level, cpu_kernels().bfloat16);
  std::fflush(stdout);
  char line[256];
  while (std::fgets(line, sizeof line, stdin)) answer(std::string(line, std::strcspn(line, "\n")));
}
