// SPDX-License-Identifier: Apache-2.0
// Text as this tool prints it: JSON strings, numbers, error messages, and output that notices a full disk.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace vim_infer {

// As Python's json.dumps(text, ensure_ascii=False) writes it. Bytes that are no UTF-8, which file names may hold,
// become lone surrogates \udc80 to \udcff, as Python represents such names.
std::string json_text(std::string_view text);

std::string number(double value, int digits);  // printf's %.*g
// A name as one line, as `literal` of vimcore/utils/files.py: what controls a terminal, and bytes that are no UTF-8,
// by their codes.
std::string literal(std::string_view text);
std::string one_line(std::string_view text);  // a message of several lines as one, made harmless likewise

std::u32string code_points(std::string_view text);  // of UTF-8; other bytes become surrogates, as in json_text

// " (did you mean NAME?)", of the name that is most like `word`; nothing where none is.
std::string did_you_mean(const std::string& word, const std::vector<std::string>& names);

// Standard output. Throws where it cannot be written; a reader that has gone away is Closed.
struct Closed {};
void print(std::string_view text);
void flush();

void complain(std::string_view text);  // "vim-infer: text" on standard error

}  // namespace vim_infer
