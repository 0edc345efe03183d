#pragma once

#include <cstddef>
#include <iosfwd>
#include <string>
#include <vector>

#include "kvernctl/commands.h"
#include "kvernctl/reading.h"

namespace kvern {

struct TopLine {
  std::string text;  ///< printable ASCII, as wide as the screen at most
  bool is_title = false;
};
/// One screen of kvernctl top: what is there now, and rates since the earlier reading. Of longer lists what matters
/// most is shown, and how many more there are.
std::vector<TopLine> top_screen(const Reading& earlier, const Reading& now, std::size_t width, std::size_t height);

struct TopOptions {
  double interval_seconds = 2;
  bool once = false;  ///< prints one screen of 80 by 24 after one interval, and ends
};
/// Draws the screen anew after every interval, until q or a signal. Needs a terminal, but for once.
int run_top(const DaemonAddress& address, const TopOptions& options, std::ostream& out);

}  // namespace kvern
