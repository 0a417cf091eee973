// SPDX-License-Identifier: Apache-2.0
// Files that people give for weights by mistake, told by their first bytes.
#include <algorithm>
#include <cctype>

#include "files/json.h"
#include "vimcore/safetensors.h"

namespace vimcore {
namespace {

constexpr std::string_view white = " \t\r\n";

bool begins_without_case(std::string_view text, std::string_view begin)
{
    const auto same = [](char small, char any) { return std::tolower(static_cast<unsigned char>(any)) == small; };
    return text.size() >= begin.size() && std::equal(begin.begin(), begin.end(), text.begin(), same);
}

bool is_text(std::string_view bytes)
{
    return std::all_of(bytes.begin(), bytes.end(),
                       [](char c) { return (c >= ' ' && c <= '~') || white.find(c) != std::string_view::npos; });
}

}  // namespace

std::string foreign_kind(std::string_view head, std::uint64_t size)
{
    if (size == 0) return "an empty file; copy or download it again";
    if (head.starts_with("version https://git-lfs"))
        return "a Git LFS pointer, not the file that it stands for; fetch that with `git lfs pull`";
    std::string_view text = head.starts_with("\xef\xbb\xbf") ? head.substr(3) : head;
    text.remove_prefix(std::min(text.find_first_not_of(white), text.size()));
    for (const char* begin : {"<!doctype", "<html", "<head", "<?xml", "<!--"})
        if (begins_without_case(text, begin))
            return "a page of the web (HTML or XML), not the file behind it; download the file itself";
    if (head.starts_with("PK\x03\x04"))
        return "a zip archive, as torch.save writes (.pth, .pt); `vimcore convert` makes a vimcore file of the "
               "weights in it";
    if (head.size() > 1 && head[0] == '\x80' && head[1] >= 2 && head[1] <= 5)
        return "a pickle, as torch.save once wrote (.pth, .pt); `vimcore convert` makes a vimcore file of the weights "
               "in it";
    if (head.starts_with("\x89HDF")) return "an HDF5 file, which holds no weights of torch";
    if (head.starts_with("\x93NUMPY")) return "an array of numpy (.npy), not a file of named weights";
    if (head.starts_with("\x1f\x8b")) return "compressed by gzip; unpack it first";
    if (is_text(head)) return "text that begins with \"" + json::printable(head, 40) + "\", not a file of weights";
    return {};
}

}  // namespace vimcore
