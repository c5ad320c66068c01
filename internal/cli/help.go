package cli

import (
	"fmt"
	"slices"
	"strings"

	urfave "github.com/urfave/cli/v3"
)

// The pages of help are written here and not by urfave's templates: those
// repeat every name of a flag with its placeholder, sort what should stay
// together, and do not wrap.

const rootIntroduction = `runv takes runc's commands, flags and bundles, and starts a virtual machine
with its own kernel for each pod. Callers of runc can call runv instead.
`

const rootExamples = `Examples:
   # Is this machine fit for runv?
   runv doctor

   # A bundle from a root file system, and a container from it:
   mkdir -p web/rootfs && tar -C web/rootfs -xf rootfs.tar
   runv spec --bundle web
   runv run --bundle web web

   # The same in steps:
   runv create --bundle web --console-socket /tmp/tty.sock web
   runv start web
   runv exec -t web sh
   runv kill web TERM
   runv delete web

   # Something is wrong:
   runv list                  # what there is, and in which state
   runv state web             # its pod, hypervisor, accelerator and times
   runv console web           # what the guest's kernel said
   runv delete --force web    # away with it, also when its supervisor is dead

Exit status: 1 for an error of runv; run and exec give the status of the
process (128+n after signal n), 127 when the program was not found, 126 when it
cannot be executed, and exec gives 255 when it failed for another reason.
`

// helpWidth is how wide a line of help may be.
const helpWidth = 80

// rootHelp is the page of `runv --help`.
func rootHelp(root *urfave.Command) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s - %s\n\n%s\nUsage:\n   runv [global options] <command> [options] [arguments]\n", root.Name, root.Usage, rootIntroduction)
	for _, group := range []string{groupLife, groupProcess, groupInspect, groupSetup} {
		fmt.Fprintf(&b, "\n%s:\n", group)
		for _, c := range root.Commands {
			if c.Category == group && !c.Hidden {
				fmt.Fprintf(&b, "   %-9s %s\n", c.Name, c.Usage)
			}
		}
	}
	fmt.Fprintf(&b, "\nGlobal options, before the command:\n%s\n%s", flagsHelp(root.Flags), rootExamples)
	return b.String()
}

// commandHelp is the page of `runv COMMAND --help`.
func commandHelp(c *urfave.Command) string {
	var b strings.Builder
	fmt.Fprintf(&b, "runv %s - %s\n\nUsage:\n   runv %[1]s", c.Name, c.Usage)
	if slices.ContainsFunc(c.Flags, shown) {
		b.WriteString(" [options]")
	}
	if c.ArgsUsage != "" {
		b.WriteString(" " + c.ArgsUsage)
	}
	b.WriteString("\n")
	text, examples, _ := strings.Cut(c.Description, "Example")
	if text != "" {
		fmt.Fprintf(&b, "\n%s\n", strings.TrimSpace(text))
	}
	fmt.Fprintf(&b, "\nOptions:\n%s", flagsHelp(c.Flags))
	if examples != "" {
		fmt.Fprintf(&b, "\nExample%s\n", examples)
	}
	return b.String()
}

func shown(f urfave.Flag) bool {
	v, ok := f.(urfave.VisibleFlag)
	return !ok || v.IsVisible()
}

// flagsHelp lists flags with their texts beside them.
func flagsHelp(flags []urfave.Flag) string {
	lines := [][2]string{}
	width := 0
	for _, f := range flags {
		doc, ok := f.(urfave.DocGenerationFlag)
		if !ok || !shown(f) {
			continue
		}
		placeholder, text := unquote(doc.GetUsage())
		name := flagNames(f.Names())
		if doc.TakesValue() {
			name += " " + placeholder
		}
		if value := doc.GetValue(); doc.TakesValue() && doc.IsDefaultVisible() && value != "" && value != "0" {
			text += " (default: " + strings.Trim(value, `"`) + ")"
		}
		lines = append(lines, [2]string{name, text})
		width = max(width, len(name))
	}
	lines = append(lines, [2]string{flagNames([]string{"help", "h"}), "show this"})
	var b strings.Builder
	for _, line := range lines {
		fmt.Fprintf(&b, "   %-*s  %s\n", width, line[0], wrap(line[1], helpWidth-width-5, width+5))
	}
	return b.String()
}

// flagNames has the short names first, and room for one where there is none.
func flagNames(names []string) string {
	short, long := "    ", ""
	for _, name := range names {
		if len(name) == 1 {
			short = "-" + name + ", "
		} else {
			long = "--" + name
		}
	}
	return short + long
}

// unquote takes the placeholder out of a flag's text: it is marked there with
// backquotes.
func unquote(usage string) (placeholder, text string) {
	parts := strings.SplitN(usage, "`", 3)
	if len(parts) < 3 {
		return "VALUE", usage
	}
	return parts[1], strings.Join(parts, "")
}

// wrap breaks text into lines of a width; all but the first are indented.
func wrap(text string, width, indent int) string {
	var b strings.Builder
	column := 0
	for i, word := range strings.Fields(text) {
		switch {
		case i > 0 && column+1+len(word) > width:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			column = 0
		case i > 0:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += len(word)
	}
	return b.String()
}
