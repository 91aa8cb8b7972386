require_relative 'plant'

module Garden
  class Calendar
    def due(plants, age)
      plants.select { |plant| plant.ripe?(age) }.map(&:name)
    end
  end
end
